"""``unichar serve``: meet the characters of finished runs in a browser."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import tyro

from unichar_jax.app.engines import Weights
from unichar_jax.errors import UserError


def serve(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    /,
    lora: tuple[Path, ...] = (),
    character: tuple[Path, ...] = (),
    host: str = "127.0.0.1",
    port: int = 7860,
    login: Path | None = None,
    steps: int = 30,
    guidance: float = 4.0,
    max_upload_mb: float = 8.0,
    max_sessions: int = 200,
    warm: bool = True,
    weights: Weights = None,
) -> int:
    """Serves a page on this machine: choose a character, talk, draw, ask about pictures. Ctrl-C ends.

    Args:
      runs: finished runs, or model directories.
      lora: folders of adapters to put around one run, each a character (or NAME=FOLDER); the base is loaded once.
      character: character folders; by default those the runs were trained on.
      host: address to listen on; 0.0.0.0 lets other machines in, which wants a --login.
      port: 0 takes a free one.
      login: a file of lines name:password; without it everybody who can reach the page may use it.
      steps: of drawing, unless the visitor chooses others.
      guidance: strength of the text when drawing, likewise.
      max_upload_mb: largest picture that may be sent, in MiB.
      max_sessions: visitors whose conversations are kept.
      warm: compile before the first visitor asks.
      weights: int8 holds the decoder's weights in eight bits: half of the memory of bfloat16.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise UserError("the web demo needs two more packages: pip install 'unichar-jax[serve]'") from None
    from unichar_jax.app import engines
    from unichar_jax.app.web import guests, server
    from unichar_jax.app.web.settings import Settings, read_users
    from unichar_jax.cli.talk import load_engine

    if not runs:
        raise UserError("no run is named; expected unichar serve RUN [RUN ...].")
    settings = Settings(
        host=host,
        port=port,
        users=read_users(login) if login else (),
        steps=steps,
        guidance=guidance,
        max_upload=int(max_upload_mb * 2**20),
        max_sessions=max_sessions,
    )
    invited = guests.invite(
        runs, character, engines.lora_names(lora), functools.partial(load_engine, weights=weights)
    )
    try:
        listening = server.Server(settings, invited, warm=warm)
        names = ", ".join(guest.persona.name for guest in invited)
        print(f"{names}: {listening.url}   (Ctrl-C ends)", flush=True)
        if not settings.local and not settings.users:
            print(
                "anyone who can reach this address can use it; --login FILE asks for a password", flush=True
            )
        listening.run()
    finally:
        for engine in {id(guest.engine): guest.engine for guest in invited}.values():
            engine.close()
    return 0
