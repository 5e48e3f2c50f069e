"""Progress of a run: a live line in a terminal, plain lines in a file, and text that looks like markup."""

import io
import re
from typing import Any

import pytest
from rich.console import Console

from bitnet.train.report.display import Display


def console(*, terminal: bool) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    # An environment of its own: under TERM=dumb, as in continuous integration, rich draws nothing.
    return Console(
        file=file, _environ={"TERM": "xterm"}, force_terminal=terminal, width=160, highlight=False, emoji=False
    ), file


def row(step: int, **changes: Any) -> dict[str, Any]:
    values = {
        "step": step,
        "loss": 2.34567,
        "bits_per_byte": 1.98765,
        "lr": 0.00123,
        "grad_norm": 1.0,
        "tokens": 512 * step,
        "tokens_per_second": 12345.6,
    }
    return {**values, **changes}


VALIDATION = {"step": 5, "val_loss": 2.25, "val_bits_per_byte": 1.5, "val_bits_per_byte_error": 0.125}


def plain(text: str) -> str:
    """Without colours and cursor movements."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_line_has_the_figures_that_matter(terminal: bool) -> None:
    target, file = console(terminal=terminal)
    display = Display(1, console=target)
    with display.live(40, 0):
        display.step(row(7))
    text = plain(file.getvalue())
    for part in ("loss 2.346", "1.988 bits/byte", "12,346 tokens/s", "lr 1.2e-03", "7/40"):
        assert part in text, part


def test_a_terminal_gets_one_line_that_is_redrawn() -> None:
    target, file = console(terminal=True)
    display = Display(1, console=target)
    with display.live(40, 0):
        for step in range(1, 41):
            display.step(row(step, loss=100.0 + step))
            display.telemetry("zeros 30% to 40%")
        display.step(row(40, loss=77.125))
    shown = plain(file.getvalue())
    assert "loss 77.125" in shown  # the last state stays on the screen
    assert "zeros 30% to 40%" in shown
    assert shown.count("\n") <= 2


def test_plain_lines_come_at_the_interval_and_at_the_end() -> None:
    target, file = console(terminal=False)
    display = Display(10, console=target)
    with display.live(25, 0):
        for step in range(1, 26):
            display.step(row(step))
    lines = file.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 10/25", "step 20/25", "step 25/25"]
    assert "\x1b" not in file.getvalue()
    assert all(line.endswith("s left") for line in lines)
    assert lines[-1].endswith(" 0 s left")


def test_speed_is_an_average_that_starts_at_the_first_step() -> None:
    target, file = console(terminal=False)
    display = Display(1, console=target)
    with display.live(3, 0):
        for step, speed in enumerate((1000.0, 3000.0, 1000.0), 1):
            display.step(row(step, tokens_per_second=speed))
    speeds = re.findall(r"([\d,]+) tokens/s", file.getvalue())
    first, second = 1000.0, 0.95 * 1000 + 0.05 * 3000
    assert speeds == [f"{value:,.0f}" for value in (first, second, 0.95 * second + 50)]


AWKWARD = ["[red]", "[/red]", "[/]", "a [bold]b[/bold] [[c]]", "runs/[x]", "\\[y]", ":cat:", "[link=x]"]


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("text", AWKWARD)
def test_text_is_never_markup(text: str, terminal: bool) -> None:
    target, file = console(terminal=terminal)
    display = Display(1, console=target)
    display.announce({"run": text}, f'[data]\npaths = ["{text}"]\n\n[train]\nsteps = 3\n')
    with display.live(9, 0):
        display.note(text)
        display.warn(text)
        display.sample(text)
    shown = plain(file.getvalue())
    assert f"run  {text}" in shown
    assert f'[data] paths = ["{text}"]' in shown
    assert "[train] steps = 3" in shown
    assert shown.count(text) >= 5  # settings, run, note, warning and sample


def test_emoji_codes_of_a_sample_stay_text(capsys: pytest.CaptureFixture[str]) -> None:
    Display(1).sample("x:cat:y")
    assert "x:cat:y" in capsys.readouterr().err


def test_preparation_names_each_stage_once_in_a_file() -> None:
    target, file = console(terminal=False)
    display = Display(1, console=target)
    for stage in ("tokenizer", "train", "val"):
        for done in range(3):
            display.preparing(stage, done, 3)
    display.prepared()
    assert file.getvalue().splitlines() == ["tokenizer ...", "train ...", "val ..."]


def test_preparation_draws_a_bar_in_a_terminal() -> None:
    target, file = console(terminal=True)
    display = Display(1, console=target)
    display.preparing("tokenizer", 1_500_000, 3_000_000)
    display.preparing("train", 500_000, None)
    display.prepared()
    display.prepared()  # twice does no harm
    shown = plain(file.getvalue())
    assert "tokenizer" in shown
    assert "train" in shown


def test_validation_line() -> None:
    target, file = console(terminal=False)
    display = Display(1, console=target)
    display.validation({**VALIDATION, "val_whole": False})
    display.validation({**VALIDATION, "val_whole": True, "val_bits_per_byte_error": None})
    first, second = file.getvalue().splitlines()
    assert first == "step 5  validation (part): loss 2.2500, 1.5000 ± 0.1250 bits/byte"
    assert second == "step 5  validation (all): loss 2.2500, 1.5000 bits/byte"


def test_validation_progress_in_a_terminal() -> None:
    target, file = console(terminal=True)
    display = Display(1, console=target)
    with display.live(9, 0):
        display.validating(25, 100)
    display.validating(50, 100)  # outside of the live block: nothing to draw on, nothing to fail on
    assert "validating 25%" in plain(file.getvalue())


def test_quiet_leaves_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(1, quiet=True)
    display.announce({"model": "x"})
    display.note("hidden")
    display.sample("hidden")
    display.preparing("train", 0, 1)
    display.warn("step 3 skipped")
    display.note("hidden")
    with display.live(2, 0):
        display.step(row(2))
    captured = capsys.readouterr()
    assert captured.err == "step 3 skipped\n"
    assert captured.out == ""


def test_everything_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(1)
    with display.live(2, 0):
        display.step(row(2))
        display.note("note")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 2


def test_the_live_line_ends_with_an_error_too() -> None:
    target, _ = console(terminal=True)
    display = Display(1, console=target)
    with pytest.raises(ValueError, match="planned"), display.live(2, 0):
        raise ValueError("planned")
    with display.live(2, 0):  # rich refuses a second live display while one is on
        display.step(row(1))
