"""How far a bench is: a bar over the cells with the time left, and the table so far beneath it."""

from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from rolldiff.bench.measure import Cell
from rolldiff.bench.settings import Setting

__all__ = ["Progress"]

SHOWN = 12  # rows that stay on the screen


class Progress:
    """Shows a bar and a table on a terminal; elsewhere it prints a line a cell.

    Args:
        total: cells.
        done: cells that were done before.
        show: False shows nothing, on processes that do not lead.
    """

    def __init__(self, total: int, done: int, *, show: bool) -> None:
        self.console = Console(stderr=True, quiet=not show, soft_wrap=True)
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("cells, left"),
            TimeRemainingColumn(),
        )
        self.bar = Bar(*columns, console=self.console, speed_estimate_period=600)
        self.task = self.bar.add_task("cells", total=total, completed=done)
        self.rows: list[list[str]] = []
        self.headers: list[str] = []
        self.live = Live(self._page(), console=self.console, refresh_per_second=2)
        if done:
            self.console.print(f"{done} of {total} cells were done before")

    def __enter__(self) -> "Progress":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def done(self, setting: Setting, cell: Cell) -> None:
        """A cell is done."""
        distances = {n: m["mean"] for n, m in cell.metrics.items() if n.startswith(("fd_", "fid"))}
        self.headers = ["cell", "nfe", "tokens", "seconds", *distances]
        values = [f"{value:.4g}" for value in distances.values()]
        costs = [str(cell.nfe), str(cell.tokens), f"{cell.seconds:.2f}"]
        self.rows.append([setting.words(), *costs, *values])
        self.bar.advance(self.task)
        if self.console.is_terminal:
            self.live.update(self._page())
        else:
            words = zip(self.headers[1:], self.rows[-1][1:], strict=True)
            self.console.print(f"{setting.words()}: " + ", ".join(f"{n} {v}" for n, v in words))

    def _page(self) -> Group:
        table = Table(*self.headers)
        for row in self.rows[-SHOWN:]:
            table.add_row(*row)
        return Group(self.bar, table) if self.rows else Group(self.bar)
