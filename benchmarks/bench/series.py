"""The tests of one contender within its budget. A short call shows how long a round takes before any round is run.

    calibrate   a few tokens are read and written; their time predicts a round of each test
    left out    a test of which not one round fits the budget, with the rate that was measured
    warm up     one round with a short answer, which is discarded; it gives a better prediction
    rounds      until the next one would not fit; fewer rounds than were asked for are reported

A call that does not return is ended at twice the budget, and its child with it. Tests that have figures keep them; the
contender's other tests are left out.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bitnet.benchmarks.bench import limits
from bitnet.benchmarks.bench.contenders import Contender, Files
from bitnet.benchmarks.bench.limits import ModelBytes
from bitnet.benchmarks.bench.plan import Test
from bitnet.benchmarks.children.process import LOAD, Child, ChildError, TooSlowError
from bitnet.config import ModelConfig

ROW = 120.0  # seconds for a test of a contender: five rounds of all but the largest models, and a table within minutes
_CALIBRATION = 0.25  # of a row, for the short call: 2B4T needs 1 s of these 30, or 10 s on a slow and busy machine
PROMPT, PREDICT = 16, 2  # tokens of a short call: a step of products with many rows, and one with few
_WARM_TOKENS = 4  # written in the warm-up: enough to warm up, where a whole answer could take long


@dataclass(frozen=True)
class Budget:
    """Seconds of one row with all its rounds, and of a load."""

    row: float = ROW
    load: float = LOAD

    @property
    def calibration(self) -> float:
        """For the short call."""
        return _CALIBRATION * self.row

    @property
    def most(self) -> float:
        """When a row is cut off. Twice the budget: predictions are optimistic, and ending a child loses other rows."""
        return 2 * self.row


@dataclass
class Series:
    """A contender that was started, and its results so far. child: None once it has ended or failed to start."""

    contender: Contender
    config: ModelConfig
    budget: Budget
    child: Child | None
    facts: dict[str, Any]
    samples: dict[Test, list[dict[str, Any]]] = field(default_factory=dict)
    left_out: dict[Test, str] = field(default_factory=dict)  # why a test has no figures
    cut_short: dict[Test, str] = field(default_factory=dict)  # why a test has fewer rounds than asked for
    cost: dict[Test, float] = field(default_factory=dict)  # predicted seconds of the next round
    spent: dict[Test, float] = field(default_factory=dict)
    peak_bytes: int = 0
    clock: Callable[[], float] = time.perf_counter

    @property
    def model_bytes(self) -> ModelBytes:
        """What it reads per token."""
        return ModelBytes(self.facts["weight_bytes"], self.facts["kv_bytes"])

    @property
    def label(self) -> str:
        """Its name in the table: the engine in use, and its options."""
        return f"{self.facts.get('backend', self.contender.name)} {self.contender.suffix}".strip()

    def close(self) -> None:
        """End its child."""
        if self.child:
            self.child.close()
            self.child = None

    def stop(self, reason: str, tests: list[Test]) -> None:
        """End its child. Tests that have figures keep them, the others are left out for this reason."""
        self.close()
        for test in tests:
            reasons = self.cut_short if self.samples.get(test) else self.left_out
            reasons.setdefault(test, reason)

    def calibrate(self, tests: list[Test]) -> None:
        """Predict what a round of each test takes, and leave out the tests of which not one fits the budget."""
        for batch in dict.fromkeys(test.batch for test in tests):
            some = [test for test in tests if test.batch == batch]
            for again in (False, True):  # the first call may be slow because it is the first: late tests get another
                late = [test for test in some if not self._fits(test)]
                if self.child and (late or not again):
                    self._calibrate(some, batch, tests)
            for test in some:
                if self.child and not self._fits(test):
                    self.left_out[test] = self._too_slow(test)

    def _calibrate(self, some: list[Test], batch: int, tests: list[Test]) -> None:
        context = self.config.context
        prompt = min(PROMPT, max(1, context // 2), max(test.prompt + test.depth for test in some))
        predict = min(PREDICT, context - prompt, max(test.predict for test in some))
        answer = self._measure(Test(prompt, predict, 0, batch), self.budget.calibration, tests)
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
        rate = self._gigamacs(test) / seconds
        return self._with_remark(
            f"{rate:.2g} GMAC/s here, one round would take {seconds:,.0f} s of its {self.budget.row:,.3g} (--budget)"
        )

    def _gigamacs(self, test: Test) -> float:
        """Billions of multiply-adds of one round."""
        return limits.work(self.config, self.model_bytes, test).macs * test.tokens * test.batch / 1e9

    def _with_remark(self, reason: str) -> str:
        return "; ".join(text for text in (reason, self.facts.get("remark")) if text)

    def has_time_for(self, test: Test) -> bool:
        """Whether another round of a test fits. The first may take the whole budget."""
        if self.child is None or test in self.left_out or test in self.cut_short:
            return False
        if self.samples.get(test) and self.spent[test] + self.cost[test] > self.budget.row:
            self.cut_short[test] = f"its {self.budget.row:,.3g} s were over (--budget)"
        return test not in self.cut_short

    def warm_up(self, test: Test, tests: list[Test]) -> None:
        """Run one round with a short answer and discard it. It predicts a round better than the short call."""
        short = Test(test.prompt, min(test.predict, _WARM_TOKENS), test.depth, test.batch)
        started = self.clock()
        answer = self._measure(short, self.budget.most, tests, test)
        if answer is None:
            return
        self.spent[test] = self.clock() - started
        rest = answer["decode"] / short.predict * (test.predict - short.predict) if short.predict else 0.0
        self.cost[test] = self.spent[test] + rest
        if not self._fits(test):
            self.left_out[test] = self._too_slow(test)

    def run(self, test: Test, tests: list[Test]) -> bool:
        """Run one round of a test and keep it. Returns whether it was measured."""
        started = self.clock()
        answer = self._measure(test, self.budget.most - self.spent[test], tests, test)
        if answer is None:
            return False
        self.cost[test] = self.clock() - started
        self.spent[test] += self.cost[test]
        self.samples.setdefault(test, []).append(answer)
        return True

    def _measure(self, call: Test, limit: float, tests: list[Test], of: Test | None = None) -> dict[str, Any] | None:
        """Run a test once, for the row `of`; None where the child has ended. Raises ChildError where ours fails."""
        assert self.child
        try:
            answer = self.child.ask(
                "measure", limit, prompt=call.prompt, predict=call.predict, depth=call.depth, batch=call.batch
            )
        except TooSlowError:
            rate, name = self._gigamacs(call) / limit, (of or call).name
            reason = f"less than {rate:.2g} GMAC/s here, {name} was ended after {limit:,.3g} s (--budget)"
            self.stop(self._with_remark(reason), tests)
            return None
        except ChildError as error:
            if self.contender.ours:
                raise
            self.stop(error.reason, tests)
            return None
        self.peak_bytes = max(self.peak_bytes, answer["peak_bytes"])
        return answer


def start(
    contender: Contender, config: ModelConfig, files: Files, tests: list[Test], threads: int, budget: Budget
) -> Series:
    """Start and load a contender. Where it is too slow, or is not ours and fails, all its tests are left out.

    Raises ChildError where one of ours fails.
    """
    series = Series(contender, config, budget, None, {})
    options = contender.options(files, threads)
    try:
        series.child = Child(
            contender.name, contender.script, options, threads, contender.python, contender.environment, budget.load
        )
    except TooSlowError:
        series.stop(f"not loaded within {budget.load:,.3g} s", tests)
        return series
    except ChildError as error:
        if contender.ours:
            raise
        series.stop(error.reason, tests)
        return series
    series.facts = series.child.facts
    series.peak_bytes = series.facts["peak_bytes"]
    return series
