"""Decoders in the terms of other libraries; a module needs the library in its name."""
