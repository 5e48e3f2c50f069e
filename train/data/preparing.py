"""The text of a run, tokenised into its folder before the first step."""

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
    """Tokenise the corpus into the run's folder, unless that is done already; returns the opened dataset.

    The tokenizer is that of `initial` or `teacher`, otherwise a new one. Raises BitNetError when the text cannot be
    used with the settings, and then leaves no data in a folder that is no run yet.
    """
    tokenizer = None
    if initial is not None:
        tokenizer = initial.tokenizer
        if tokenizer is None:
            raise BitNetError(f"train: got no tokenizer in '{config.train.init}', expected the one it was trained with")
    elif config.train.init and is_prepared(run.data):
        tokenizer = open_tokenizer(run.data)  # resumed without the model it started from
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
        dataset.tokenizer.encode(config.train.sample_prompt)  # raises now rather than after the last step
        return dataset
    except BitNetError:
        if not run.exists():
            shutil.rmtree(run.data, ignore_errors=True)
        raise
    finally:
        display.prepared()
