"""The text of a run as tokens in its folder, before the first step."""

import shutil

from bitnet.errors import BitNetError
from bitnet.train.config import RunConfig
from bitnet.train.data.prepare import prepare
from bitnet.train.data.shards import TokenDataset, is_prepared, open_tokenizer
from bitnet.train.data.windows import check_lengths
from bitnet.train.initial import Initial, Teacher, teacher_tokenizer
from bitnet.train.report.display import Display
from bitnet.train.runs.run import Run


def prepare_data(
    config: RunConfig, run: Run, display: Display, initial: Initial | None = None, teacher: Teacher | None = None
) -> TokenDataset:
    """Tokenise the corpus into the run's folder, unless that is done already.

    Raises BitNetError, and leaves nothing of a first try, when the text is too short for the settings.
    """
    tokenizer = None
    if initial is not None:
        tokenizer = initial.tokenizer
        if tokenizer is None:
            raise BitNetError(f"train: got no tokenizer in '{config.train.init}', expected the one it was trained with")
    elif config.train.init and is_prepared(run.data):
        tokenizer = open_tokenizer(run.data)  # the run goes on without the model it began with
    elif teacher is not None:
        tokenizer = teacher_tokenizer(config, teacher)
    try:
        dataset = prepare(
            config.data,
            run.data,
            tokenizer=tokenizer,
            kind=config.tokenizer.kind,
            vocab_size=config.requested_vocab_size,
            report=display.preparing,
        )
        check_lengths(dataset, config.context)
        dataset.tokenizer.encode(config.train.sample_prompt)  # refused now, not after the last step
        return dataset
    except BitNetError:
        if not run.exists():
            shutil.rmtree(run.data, ignore_errors=True)
        raise
    finally:
        display.prepared()
