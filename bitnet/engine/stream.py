"""Continue a text on any engine, one id at a time."""

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from bitnet.engine.sampling import Sampler, Sampling
from bitnet.errors import BitNetError

if TYPE_CHECKING:
    pass
from bitnet.engine.base import Engine, Session


def stream(
    engine: Engine,
    ids: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop: Collection[int] = (),
    limit: int | None = None,
) -> Iterator[int]:
    """Continue `ids` on any engine, one id at a time; ends after `max_new_tokens` or an id in `stop`.

    limit: tokens the cache holds (default: the model's context). A text that outgrows it goes on from the last
    half of what it has, read again from position 0: the model never sees a position it was not trained for.
    Raises BitNetError for an empty prompt and for ids the model does not have.
    """
    limit = limit or engine.config.context
    history = list(ids)
    if not history:
        raise BitNetError("generate: got an empty prompt, expected at least one token; give a text or a BOS token")
    if max_new_tokens < 0:
        raise BitNetError(f"generate: got {max_new_tokens} new tokens, expected 0 or more")
    sampler = Sampler(sampling or Sampling())
    session: Session | None = None
    for _ in range(max_new_tokens):
        if session is not None and session.position < session.limit:
            logits = session.decode(torch.tensor(history[-1:]))
        else:
            kept = history if len(history) <= limit and session is None else history[-max(1, limit // 2) :]
            session = engine.session(1, limit)
            logits = session.prefill(torch.tensor([kept]))
        token = int(sampler.draw(logits))
        if token in stop:
            return
        history.append(token)
        yield token
