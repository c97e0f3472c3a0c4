"""`python -m pairquant.engines.transformers_server --served-model-name NAME serve DIRECTORY …`: `transformers serve`, guarded.

Importing this package has registered our checkpoints with Transformers; its own command would load random weights with
a warning. `guard` puts subclasses in place of the parts that the command builds its server from. They check requests
(`requests`), keep answers within the model's context, tell the one model that is served, and give every error the form
that OpenAI's clients read.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException
from transformers.cli.serving import chat_completion, completion, model_manager, response, server, utils
from transformers.cli.transformers import app

from ..support.errors import PairQuantError
from .engine import context_of
from .requests import CHAT, COMPLETIONS, RESPONSES, RequestError, Rule, check, error_body, room_for_answer
from .transformers import finite_logits

#: How Transformers begins an event of a stream that tells an error.
STREAM_ERROR = 'data: {"error": "'
#: Routes that are taken away: they load other models, drop the served one, or need a model that hears.
REMOVED = ("/load_model", "/reset", "/v1/audio/transcriptions")


@dataclass(frozen=True)
class Served:
    """The model that is served. name: as clients call it; max_model_len: longest sequence, None for the model's own."""

    name: str
    max_model_len: int | None = None

    def context(self, model: Any) -> int | None:
        """Return the longest sequence in tokens; None where nothing limits it."""
        limits = [limit for limit in (self.max_model_len, context_of(model.config)) if limit is not None]
        return min(limits, default=None)


class _Handler:
    """Checks a request, for any of Transformers' handlers.

    rules: of the endpoint; required: the field that must be there; limit: the field that limits the answer's length.
    """

    rules: Mapping[str, Rule]
    required: str
    limit = "max_tokens"

    def __init__(self, served: Served, **parts: Any):
        super().__init__(**parts)
        self.served = served

    async def handle_request(self, body: dict, request_id: str) -> Any:
        """Answer a request; errors in the midst of a stream get OpenAI's form."""
        answer = await super().handle_request(body, request_id)  # type: ignore[misc]
        if isinstance(answer, StreamingResponse):
            answer.body_iterator = _mend_errors(answer.body_iterator)  # type: ignore[arg-type]  # starlette says less than it gives
        return answer

    def _validate_request(self, body: dict) -> None:
        """Check a request, and make "no stream" the default of every endpoint; raises `RequestError`."""
        check(body, self.rules, self.required)
        body.setdefault("stream", False)
        super()._validate_request(body)  # type: ignore[misc]

    def _resolve_model(self, body: dict) -> tuple[str, Any, Any]:
        """Return the served name, the model and its tokenizer; raises `RequestError` for another model's name."""
        asked = body.pop("model", self.served.name)
        if asked != self.served.name:
            raise RequestError(f"model is {asked!r}, allowed: {self.served.name!r}, which is served here.", 404)
        _, model, processor = super()._resolve_model(body)  # type: ignore[misc]
        return self.served.name, model, processor

    def _build_generation_config(self, body: dict, *arguments: Any, **options: Any) -> Any:
        """Sample where a temperature is asked for, whatever the model does by itself; see `_Manager` for the length."""
        config = super()._build_generation_config(body, *arguments, **options)  # type: ignore[misc]
        if body.get("temperature"):
            config.do_sample = True
        if self.limit not in body and "generation_config" not in body:
            config.max_new_tokens = None
        return config


async def _mend_errors(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """Pass a stream's events on; Transformers tells errors as bare strings, whose text OpenAI's clients do not show.

    The mark cannot be part of an answer's text: there, quotes are escaped.
    """
    async for event in events:
        before, mark, message = event.partition(STREAM_ERROR)
        if mark:
            body = error_body(message.strip().removesuffix('"}'), 500)
            yield f"{before}data: {json.dumps(body)}\n\n"
        else:
            yield event


class Chat(_Handler, chat_completion.ChatCompletionHandler):
    rules, required = CHAT, "messages"


class Completions(_Handler, completion.CompletionHandler):
    rules, required = COMPLETIONS, "prompt"


class Responses(_Handler, response.ResponseHandler):
    rules, required, limit = RESPONSES, "input", "max_output_tokens"


class _Manager:
    """Limits each answer to the room that its prompt leaves, for either of Transformers' generation managers."""

    def __init__(self, served: Served, **parts: Any):
        super().__init__(**parts)
        self.served = served

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, gen_config: Any, **rest: Any) -> Any:
        """Raise `RequestError`."""
        self._limit(model, inputs, gen_config)
        return super().generate_streaming(model, processor, inputs, gen_config, **rest)  # type: ignore[misc]

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, **rest: Any
    ) -> Any:
        """Raise `RequestError`."""
        self._limit(model, inputs, gen_config)
        return await super().generate_non_streaming(model, processor, inputs, gen_config, **rest)  # type: ignore[misc]

    def _limit(self, model: Any, inputs: Any, gen_config: Any) -> None:
        """Set the length of the answer in place, where the handler reads it to tell why the answer ended."""
        tokens = inputs["input_ids"]
        gen_config.max_new_tokens = room_for_answer(
            len(tokens) if isinstance(tokens, list) else tokens.shape[-1],
            gen_config.max_new_tokens,
            model.generation_config.max_new_tokens,
            self.served.context(model),
        )


class Sequential(_Manager, utils.GenerateManager):  # type: ignore[misc]  # any arguments pass
    """One request after the other."""


class Continuous(_Manager, utils.CBGenerateManager):  # type: ignore[misc]
    """Several requests at once."""


class OneModel(model_manager.ModelManager):
    """Knows the one model that is served, and watches its logits."""

    def __init__(self, served: Served, **options: Any):
        self.served = served
        self.since = int(time.time())
        super().__init__(**options)

    def _load_model(self, *arguments: Any, **options: Any) -> Any:
        model: Any = super()._load_model(*arguments, **options)
        setattr(model, "generate", partial(model.generate, logits_processor=finite_logits(model.dtype)))  # noqa: B010
        return model

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict]:  # type: ignore[override]
        """Return what `/v1/models` lists; Transformers would list the hub's cache."""
        (loaded,) = self.loaded_models.values()
        return [
            {
                "id": self.served.name,
                "object": "model",
                "created": self.since,
                "owned_by": "pairquant",
                "max_model_len": self.served.context(loaded.model),
            }
        ]

    def list_models(self) -> list[dict]:
        """Return the same: Transformers 5.24 asks by this name, earlier versions by the other."""
        return self.get_gen_models()


def build_server(build: Any, *parts: Any, **options: Any) -> FastAPI:
    """Return the application that Transformers' function `build` makes, with our errors and without `REMOVED`."""
    built = build(*parts, **options)
    built.router.routes[:] = [route for route in built.router.routes if getattr(route, "path", None) not in REMOVED]
    for kind, status in (
        (RequestError, lambda error: error.status),
        (HTTPException, lambda error: error.status_code),
        (RequestValidationError, lambda error: 400),  # what is no JSON object
        (TemplateError, lambda error: 400),  # chat templates refuse conversations in this way
        (PairQuantError, lambda error: 500),  # such as an overflow
        (Exception, lambda error: 500),
    ):
        built.add_exception_handler(kind, partial(_answer_error, status))
    return built


async def _answer_error(status: Any, request: Any, error: Exception) -> JSONResponse:
    """Return an error in OpenAI's form. status: gives the HTTP status of an error."""
    code = status(error)
    if isinstance(error, RequestValidationError):
        message = f"the body of the request is no JSON object: {error.errors()[0]['msg']}."
    else:
        message = str(getattr(error, "detail", None) or error) or type(error).__name__
    return JSONResponse(error_body(message, code), status_code=code)


def guard(served: Served) -> None:
    """Have `transformers serve` build its server, in this process, from the classes above."""
    replaced: tuple[tuple[Any, str, Any], ...] = (
        (chat_completion, "ChatCompletionHandler", Chat),
        (completion, "CompletionHandler", Completions),
        (response, "ResponseHandler", Responses),
        (utils, "GenerateManager", Sequential),
        (utils, "CBGenerateManager", Continuous),
        (model_manager, "ModelManager", OneModel),
    )
    for module, name, ours in replaced:
        setattr(module, name, partial(ours, served))
    server.build_server = partial(build_server, server.build_server)


def main(arguments: Sequence[str]) -> None:
    """Run `transformers serve` with the arguments that are not ours."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--max-model-len", type=int)
    ours, rest = parser.parse_known_args(arguments)
    guard(Served(ours.served_model_name, ours.max_model_len))
    try:
        app(rest)
    except PairQuantError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
