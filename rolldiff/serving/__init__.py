"""`rolldiff serve`: a model behind OpenAI's image requests, and a page to watch it decode.

`model.py` says what is served, `wire.py` reads requests and writes answers, `worker.py` owns the
model in one thread, `app.py` joins them over HTTP, and `page/` is what a browser shows.
"""

from rolldiff.serving.app import create_app, run
from rolldiff.serving.model import Limits, Served

__all__ = ["Limits", "Served", "create_app", "run"]
