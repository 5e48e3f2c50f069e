"""A contender at work within its budget: how long a round takes is found by a short call, before any round is run.

    calibrated      a few tokens are read and written; what a round of each test takes follows from their time
    left out        a test of which not one round fits its budget, with the rate that was measured
    warmed up       one round with a short answer, which is thrown away and tells the time of a round better
    rounds          until the next one would not fit: fewer than were asked for is said

A call that does not return is ended at twice the budget, and its contender's process with it: what it has measured
stays, its other tests are left out.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bitnet.benchmarks.bench import limits
from bitnet.benchmarks.bench.contenders import Contender, Files
from bitnet.benchmarks.bench.limits import Weights
from bitnet.benchmarks.bench.plan import Test
from bitnet.benchmarks.bench.process import LOAD, TooSlowError, Worker
from bitnet.config import ModelConfig
from bitnet.errors import BitNetError

ROW = 120.0  # seconds a test of a contender may take: five rounds of all but the largest models, and a table in minutes
_CALIBRATION = (
    0.25  # of a row, for the short call: of 30 s 2B4T takes one, on a busy machine of a tenth of the speed ten
)
_PROMPT, _PREDICT = 16, 2  # tokens of the short call: a step of products with many rows, and one with few
_WARM_TOKENS = 4  # written in the warm-up: one would do, and a slow contender takes long


@dataclass(frozen=True)
class Budget:
    """Seconds: of one row with all its rounds, and of a load."""

    row: float = ROW
    load: float = LOAD

    @property
    def calibration(self) -> float:
        """Of the short call."""
        return _CALIBRATION * self.row

    @property
    def most(self) -> float:
        """After so long a row is cut off: estimates are of a quiet moment, and a killed process loses other rows."""
        return 2 * self.row


@dataclass
class Runner:
    """A contender that was started, and what it has done so far. worker: None once it is gone, or never came."""

    contender: Contender
    config: ModelConfig
    budget: Budget
    worker: Worker | None
    facts: dict[str, Any]
    taken: dict[Test, list[dict[str, Any]]] = field(default_factory=dict)
    left_out: dict[Test, str] = field(default_factory=dict)  # why a test has no figures
    cut_short: dict[Test, str] = field(default_factory=dict)  # why a test has fewer rounds than asked for
    cost: dict[Test, float] = field(default_factory=dict)  # seconds of the next round
    spent: dict[Test, float] = field(default_factory=dict)
    peak_bytes: int = 0
    clock: Callable[[], float] = time.perf_counter

    @property
    def weights(self) -> Weights:
        """What a token reads."""
        return Weights(self.facts["weight_bytes"], self.facts["kv_bytes"])

    @property
    def label(self) -> str:
        """What the table calls it: the engine in use, and what tells it from its neighbours."""
        return f"{self.facts.get('backend', self.contender.name)} {self.contender.suffix}".strip()

    def close(self) -> None:
        """End its process."""
        if self.worker:
            self.worker.close()
            self.worker = None

    def lose(self, reason: str, tests: list[Test]) -> None:
        """Let go of its process: tests that have figures keep them, the others are left out."""
        self.close()
        for test in tests:
            kept = self.cut_short if self.taken.get(test) else self.left_out
            kept.setdefault(test, reason)

    def calibrate(self, tests: list[Test]) -> None:
        """Find what a round of each test takes, and leave out those of which not one fits the budget."""
        for batch in dict.fromkeys(test.batch for test in tests):
            some = [test for test in tests if test.batch == batch]
            for again in (False, True):  # a first call warms up; who does not fit by it gets another
                late = [test for test in some if not self._fits(test)]
                if self.worker and (late or not again):
                    self._calibrate(some, batch, tests)
            for test in some:
                if self.worker and not self._fits(test):
                    self.left_out[test] = self._too_slow(test)

    def _calibrate(self, some: list[Test], batch: int, tests: list[Test]) -> None:
        context = self.config.context
        prompt = min(_PROMPT, max(1, context // 2), max(test.prompt + test.depth for test in some))
        predict = min(_PREDICT, context - prompt, max(test.predict for test in some))
        short = Test(prompt, predict, 0, batch)
        answer = self._ask(short, self.budget.calibration, tests)
        if answer is None:
            return
        reading = answer["prefill"] / prompt if prompt else 0.0
        writing = answer["decode"] / predict if predict else 0.0
        for test in some:
            self.cost[test] = (test.depth + test.prompt) * reading + test.predict * writing

    def _fits(self, test: Test) -> bool:
        return self.cost.get(test, 0.0) <= self.budget.row

    def _too_slow(self, test: Test) -> str:
        seconds = self.cost[test]
        rate = limits.work(self.config, self.weights, test).macs * test.tokens * test.batch / seconds / 1e9
        said = f"{rate:.2g} GMAC/s here, one round would take {seconds:,.0f} s of its {self.budget.row:,.3g} (--budget)"
        return "; ".join(part for part in (said, self.facts.get("remark")) if part)

    def wants(self, test: Test) -> bool:
        """Whether another round of a test fits. The first may take the whole budget."""
        if self.worker is None or test in self.left_out or test in self.cut_short:
            return False
        if self.taken.get(test) and self.spent[test] + self.cost[test] > self.budget.row:
            self.cut_short[test] = f"its {self.budget.row:,.3g} s were over (--budget)"
        return test not in self.cut_short

    def warm_up(self, test: Test, tests: list[Test]) -> None:
        """One round that is thrown away, of a short answer. Tells the time of a round better than the short call."""
        short = Test(test.prompt, min(test.predict, _WARM_TOKENS), test.depth, test.batch)
        started = self.clock()
        answer = self._ask(short, self.budget.most, tests, test)
        if answer is None:
            return
        self.spent[test] = self.clock() - started
        rest = answer["decode"] / short.predict * (test.predict - short.predict) if short.predict else 0.0
        self.cost[test] = self.spent[test] + rest
        if not self._fits(test):
            self.left_out[test] = self._too_slow(test)

    def run(self, test: Test, tests: list[Test]) -> bool:
        """One round of a test, which is kept. Returns whether it was measured."""
        started = self.clock()
        answer = self._ask(test, self.budget.most - self.spent[test], tests, test)
        if answer is None:
            return False
        self.cost[test] = self.clock() - started
        self.spent[test] += self.cost[test]
        self.taken.setdefault(test, []).append(answer)
        return True

    def _ask(self, run: Test, limit: float, tests: list[Test], of: Test | None = None) -> dict[str, Any] | None:
        """Run a test once; None where its process is gone now. Raises BitNetError where one of ours fails."""
        assert self.worker
        try:
            answer = self.worker.ask(
                "measure", limit, prompt=run.prompt, predict=run.predict, depth=run.depth, batch=run.batch
            )
        except TooSlowError:
            macs = limits.work(self.config, self.weights, run).macs * run.tokens * run.batch
            what = (of or run).name
            said = f"less than {macs / limit / 1e9:.2g} GMAC/s here, {what} was ended after {limit:,.3g} s (--budget)"
            self.lose("; ".join(part for part in (said, self.facts.get("remark")) if part), tests)
            return None
        except BitNetError as error:
            if self.contender.ours:
                raise
            self.lose(_without_name(error, self.contender.name), tests)
            return None
        self.peak_bytes = max(self.peak_bytes, answer["peak_bytes"])
        return answer


def start(
    contender: Contender, config: ModelConfig, files: Files, tests: list[Test], threads: int, budget: Budget
) -> Runner:
    """Start and load a contender. One that is not there in time, or another's that fails, has all its tests left out.

    Raises BitNetError where one of ours fails.
    """
    runner = Runner(contender, config, budget, None, {})
    options = contender.options(files, threads)
    try:
        runner.worker = Worker(
            contender.name, contender.script, options, threads, contender.python, contender.environment, budget.load
        )
    except TooSlowError:
        runner.lose(f"not loaded within {budget.load:,.3g} s", tests)
        return runner
    except BitNetError as error:
        if contender.ours:
            raise
        runner.lose(_without_name(error, contender.name), tests)
        return runner
    runner.facts = runner.worker.facts
    runner.peak_bytes = runner.facts["peak_bytes"]
    return runner


def _without_name(error: BitNetError, name: str) -> str:
    return str(error).removeprefix(f"{name}: ")
