"""/tokenize, /detokenize and /tokenizer_info: text to ids and back."""

from starlette.requests import Request
from starlette.responses import Response

from bitnet.generation import prompt_ids
from bitnet.serve.protocol import RequestError, flag, refuse
from bitnet.serve.replies import json_reply
from bitnet.serve.service import in_vocabulary, read_json, service_of
from bitnet.serve.text import Speller
from bitnet.text.tokenizer import Tokenizer


async def tokenize(request: Request) -> Response:
    """{"prompt" or "content": text, "add_special_tokens": whether to add BOS as for a prompt (default true)} to ids."""
    service, values = service_of(request), await read_json(request)
    model = service.model
    text = values.get("prompt", values.get("content"))
    if not isinstance(text, str):
        raise refuse("prompt", text, "a text")
    special = values.get("add_special_tokens") is None or flag(values, "add_special_tokens")
    control = _control_ids(model.tokenizer)
    if not special and text in control:
        ids = [control[text]]  # the text is the name of a control token: its id is what is asked for
    else:
        encoder = (lambda: prompt_ids(model.tokenizer, text)) if special else (lambda: model.tokenizer.encode(text))
        ids = await service.encode(encoder, "")  # of any length, since the ids are not kept
    return json_reply({"tokens": ids, "count": len(ids), "max_model_len": model.limit})


def _control_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """By name: the ids of BOS and EOS."""
    speller = Speller(tokenizer)
    return {speller.name(id): id for id in (tokenizer.bos_id, tokenizer.eos_id) if id is not None}


async def detokenize(request: Request) -> Response:
    """{"tokens": ids} to {"prompt": text}."""
    service, values = service_of(request), await read_json(request)
    tokenizer, ids = service.model.tokenizer, values.get("tokens")
    if not isinstance(ids, list) or not all(type(id) is int for id in ids):
        raise refuse("tokens", ids, "a list of token ids")
    if not in_vocabulary(ids, tokenizer.vocab_size):
        raise RequestError(400, f"tokens: expected ids from 0 to {tokenizer.vocab_size - 1}", param="tokens")
    text = tokenizer.decode(ids)
    return json_reply({"prompt": text, "content": text})


async def tokenizer_info(request: Request) -> Response:
    """The names of special tokens, which lm-eval needs to leave tokenising to a server; /tokenize gives their ids."""
    model = service_of(request).model
    speller = Speller(model.tokenizer)
    ids = {"bos_token": model.tokenizer.bos_id, "eos_token": model.tokenizer.eos_id}
    names = {name: None if id is None else speller.name(id) for name, id in ids.items()}
    return json_reply({**names, "pad_token": None, "chat_template": model.tokenizer.chat_template})
