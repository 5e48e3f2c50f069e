"""Progress of a run on stderr: a live line in a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from bitnet.tables import plus_minus


class Display:
    """Shows the progress of one run. every: steps between plain lines; quiet: show warnings only."""

    def __init__(self, every: int = 50, *, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False, emoji=False, quiet=quiet, soft_wrap=True)
        self.every = every
        self._live: Progress | None = None
        self._task: TaskID | None = None
        self._bar: Progress | None = None  # while data is prepared
        self._stage: tuple[str, TaskID] | None = None
        self._total, self._start, self._started = 0, 0, 0.0
        self._speed = 0.0
        self._zeros = ""

    # -- before the first step -----------------------------------------------------------------------------------

    def preparing(self, stage: str, done: int, total: int | None) -> None:
        """Progress of tokenisation, in bytes of text."""
        if not self.console.is_terminal:
            if self._stage is None or self._stage[0] != stage:
                self._stage = (stage, TaskID(0))
                self.console.print(f"{stage} ...")
            return
        if self._bar is None:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                TextColumn("{task.fields[size]}"),
                TimeElapsedColumn(),
                console=self.console,
                transient=True,
            )
            self._bar.start()
        if self._stage is None or self._stage[0] != stage:
            self._stage = (stage, self._bar.add_task(stage, total=total, size=""))
        size = f"{done / 1e6:.1f} MB" + (f" of {total / 1e6:.1f}" if total else "")
        self._bar.update(self._stage[1], completed=done, total=total, size=size)

    def prepared(self) -> None:
        """Remove the progress bar of `preparing`."""
        if self._bar is not None:
            self._bar.stop()
        self._bar, self._stage = None, None

    def announce(self, lines: dict[str, str], config: str = "") -> None:
        """Show all settings, then one line per subject. config: TOML."""
        for section in filter(None, config.strip().split("\n\n")):
            name, *settings = section.splitlines()
            text = ", ".join(settings)
            # Two columns, wrapped at words, in a terminal; one line, which can be searched, in a log.
            shown: RenderableType = Text(f"{name} {text}")
            if self.console.is_terminal:
                shown = Table.grid(padding=(0, 1, 0, 0))
                shown.add_row(Text(name), Text(text))
            self.console.print(shown, style="dim", soft_wrap=not self.console.is_terminal)
        for name, text in lines.items():
            self.console.print(f"[bold]{name:>9}[/bold]  {escape(text)}", markup=True)

    # -- while it trains -----------------------------------------------------------------------------------------

    @contextmanager
    def live(self, total: int, start: int) -> Iterator[None]:
        """Show the live line while the block runs. total, start: steps."""
        self._total, self._start, self._started = total, start, time.perf_counter()
        if not self.console.is_terminal:
            yield
            return
        with Progress(
            TextColumn("[bold]{task.completed:.0f}[/bold]/{task.total:.0f}"),
            BarColumn(bar_width=12),
            TextColumn("{task.description}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
        ) as self._live:
            self._task = self._live.add_task("", total=total, completed=start)
            yield
        self._live = None

    def step(self, row: dict[str, Any]) -> None:
        """Show a training step. row: its metrics."""
        # Averaged over about twenty steps, because single steps vary on a shared machine.
        self._speed = (
            row["tokens_per_second"] if not self._speed else 0.95 * self._speed + 0.05 * row["tokens_per_second"]
        )
        text = (
            f"loss {row['loss']:.3f}  {row['bits_per_byte']:.3f} bits/byte  "
            f"{self._speed:,.0f} tokens/s  lr {row['lr']:.1e}"
        )
        if "quantised" in row:
            text += f"  {row['quantised']:.0%} quantised"
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=row["step"], description=f"{text}  {self._zeros}")
        elif row["step"] % self.every == 0 or row["step"] == self._total:
            elapsed = time.perf_counter() - self._started
            left = elapsed / max(1, row["step"] - self._start) * (self._total - row["step"])
            self.console.print(f"step {row['step']}/{self._total}  {text}  {left:.0f} s left")

    def telemetry(self, text: str) -> None:
        """Show a summary of the quantised weights."""
        self._zeros = text
        if self._live is None:
            self.console.print(f"  weights: {text}")

    def validating(self, done: int, total: int) -> None:
        """Show the progress of a validation, in tokens."""
        if self._live is not None and self._task is not None and total:
            self._live.update(self._task, description=f"validating {done / total:.0%}")

    def validation(self, row: dict[str, Any]) -> None:
        """Show a validation result. row: its metrics."""
        scope = "all" if row["val_whole"] else "part"
        self.note(
            f"step {row['step']}  validation ({scope}): loss {row['val_loss']:.4f}, "
            f"{row['val_bits_per_byte']:.4f}{plus_minus(row['val_bits_per_byte_error'], 4)} bits/byte"
        )

    def sample(self, text: str) -> None:
        """Show the first lines of a generated text."""
        lines = text.strip("\n").splitlines()[:12]
        self.note("\n".join(["sample:", *(f"  | {line}" for line in lines)]))

    def warn(self, text: str) -> None:
        """Show a line even when quiet."""
        quiet, self.console.quiet = self.console.quiet, False
        self.note(text)
        self.console.quiet = quiet

    def note(self, text: str) -> None:
        """Show a line that stays, above the live one."""
        self.console.print(text, markup=False)
