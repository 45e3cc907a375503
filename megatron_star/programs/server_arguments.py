"""The command line's group of the server: where it listens, whom it lets in, how much, what a query is."""

import argparse
from pathlib import Path

from megatron_star.checked_input import read_text
from megatron_star.job.argument_types import (
    count,
    positive,
    real_number,
    text_argument,
    token_count,
    whole_number,
)
from megatron_star.job.sampling_arguments import add_speculate_argument
from megatron_star.job.star_arguments import star_config
from megatron_star.server.keys import KeyRing
from megatron_star.server.settings import ServerSettings
from megatron_star.server.tools.formats import AUTO, CALL_NAMES, OFF, REASONING_NAMES
from megatron_star.text.chat_template import check_template

_seconds = real_number(0, 1e7, what="a number of seconds")


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """What `server_settings` reads, and the address."""
    group = parser.add_argument_group("server (byte counts may be written 64K or 16M)")
    _add_who_is_let_in(group)
    _add_how_much(group)
    _add_what_is_told(group)
    _add_how_long(group)
    _add_what_a_query_is(group)
    _add_templates(group)
    _add_what_answers_say(group)
    add_speculate_argument(group)


def _add_who_is_let_in(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--host", type=text_argument, default="127.0.0.1", help="0.0.0.0 lets other machines in"
    )
    group.add_argument(
        "--port", type=whole_number(0, 65535), default=5000, metavar="N", help="0 takes a free one"
    )
    group.add_argument(
        "--api-key-file",
        type=text_argument,
        metavar="FILE",
        help="clients must send a key that is in it: one line, or TOML with limits of each; default: no key",
    )
    group.add_argument(
        "--served-model-name",
        type=text_argument,
        nargs="+",
        metavar="NAME",
        help="what clients may call the model; answers have the first; default: name of the --load folder",
    )
    group.add_argument(
        "--allowed-origins",
        type=text_argument,
        nargs="+",
        default=[],
        metavar="ORIGIN",
        help="of pages elsewhere that may use the server from a browser, as https://app.example; "
        "with a key, * is all of them",
    )
    group.add_argument(
        "--root-path",
        type=text_argument,
        metavar="PATH",
        help="under which a proxy shows the server, as /star; it passes requests on without it",
    )


def _add_how_much(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max-request-bytes", type=token_count, default=16 << 20, metavar="BYTES", help="of one body"
    )
    group.add_argument(
        "--max-concurrent-requests", type=positive, default=64, metavar="N", help="sequences that run"
    )
    group.add_argument(
        "--max-queued-requests", type=count, default=256, metavar="N", help="sequences that wait for that"
    )
    group.add_argument(
        "--max-context-tokens",
        type=token_count,
        metavar="TOKENS",
        help="of one context; default: the model's limit",
    )


def _add_what_is_told(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max-contexts", type=count, default=64, metavar="N", help="that a key may keep by /v1/contexts"
    )
    group.add_argument(
        "--max-context-bytes",
        type=token_count,
        default=256 << 20,
        metavar="BYTES",
        help="that texts and tokens of these may take, without KV",
    )
    group.add_argument(
        "--metrics-per-expert",
        action="store_true",
        help="/metrics counts the tokens of each expert of each layer: thousands of series; "
        "default: how uneven layers are",
    )
    group.add_argument(
        "--otlp-traces-endpoint",
        type=text_argument,
        metavar="URL",
        help="of a collector, as http://collector:4318/v1/traces; traces of requests are sent to it",
    )


def _add_how_long(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--drain-notice-seconds",
        type=_seconds,
        default=0.0,
        metavar="S",
        help="after SIGTERM, in which /health says 503 and requests are taken: until a proxy has seen it",
    )
    group.add_argument(
        "--drain-seconds",
        type=_seconds,
        default=30.0,
        metavar="S",
        help="after that, for running requests to end",
    )
    group.add_argument(
        "--request-body-seconds",
        type=_seconds,
        default=60.0,
        metavar="S",
        help="for a request's head, and then for its body",
    )
    group.add_argument(
        "--keep-alive-seconds",
        type=_seconds,
        default=75.0,
        metavar="S",
        help="for which a connection may say nothing after an answer; more than its client keeps it (75)",
    )


def _add_templates(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--chat-template",
        type=text_argument,
        metavar="FILE",
        help="a Jinja template that writes chats; default: the tokenizer's own",
    )
    group.add_argument(
        "--trust-request-chat-template",
        action="store_true",
        help="requests may have a chat_template of their own; default: they are refused",
    )


def _add_what_a_query_is(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--star-query-tokens",
        type=positive,
        default=256,
        metavar="TOKENS",
        help="end of a prompt that is its query, where the request does not say",
    )
    group.add_argument(
        "--star-separator",
        type=text_argument,
        metavar="TEXT",
        help="between context and query, where a prompt has it",
    )
    group.add_argument(
        "--star-max-wait-seconds",
        type=_seconds,
        default=1.0,
        metavar="S",
        help="between two tokens of an answer while another context is encoded; waves are cut to it",
    )


def _add_what_answers_say(group: argparse._ArgumentGroup) -> None:
    for what, names in (("tool-call", CALL_NAMES), ("reasoning", REASONING_NAMES)):
        group.add_argument(
            f"--{what}-parser",
            choices=(AUTO, OFF, *names),
            default=AUTO,
            metavar="NAME",
            help=f"how the model writes it: {', '.join(names)}; off; auto: as its chat template shows",
        )


def server_settings(args: argparse.Namespace) -> ServerSettings:
    """The settings that these arguments ask for; raises ValueError or OSError."""
    key_file = args.api_key_file
    name, *more_names = args.served_model_name or [Path(args.load).resolve().name]
    return ServerSettings(
        model_name=name,
        more_model_names=tuple(more_names),
        star=star_config(args),
        num_query_tokens=args.star_query_tokens,
        separator=args.star_separator,
        keys=KeyRing.of_file(key_file) if key_file else None,
        max_request_bytes=args.max_request_bytes,
        max_concurrent_requests=args.max_concurrent_requests,
        max_queued_requests=args.max_queued_requests,
        max_context_tokens=args.max_context_tokens,
        max_contexts=args.max_contexts,
        max_context_bytes=args.max_context_bytes,
        body_seconds=args.request_body_seconds,
        keep_alive_seconds=args.keep_alive_seconds,
        speculate=args.speculate,
        metrics_per_expert=args.metrics_per_expert,
        tool_call_parser=args.tool_call_parser,
        reasoning_parser=args.reasoning_parser,
        otlp_traces_endpoint=args.otlp_traces_endpoint,
        chat_template=_chat_template(args.chat_template),
        trust_request_chat_template=args.trust_request_chat_template,
        host=args.host,
        allowed_origins=tuple(args.allowed_origins),
        root_path=args.root_path or "",
    )


def _chat_template(file: str | None) -> str | None:
    if file is None:
        return None
    template = read_text(file)
    try:
        check_template(template)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return template
