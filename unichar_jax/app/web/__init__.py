"""The web demo: one page to meet the characters, served by ``unichar serve``.

Why Starlette and uvicorn, and not Gradio: (1) weight: two packages beside what the library needs anyway,
where Gradio 6.31 brings twenty, pandas among them, and holds Pillow below 13 (pictures here are resized by a
pinned Pillow, because training saw its pixels); (2) a conversation that outlives its connection, which Gradio
ties to its queue; (3) what is reachable: this server answers from memory alone, no request names a file, so
there is no folder to leave; (4) one page of plain HTML, CSS and JavaScript that a reader can check, without a
build step, and that loads nothing from anywhere else.

How it works: a visitor's session is a list of *entries* (a turn, a sheet of drawings, an answer), each with
the version of its last change. Requests add an entry and return at once; the work is done in the session's
order by a pool of threads on the engine, whoever listens. The page listens to one stream of changed entries
(server-sent events) and asks again from the last version it saw, so a lost connection or a reload loses
nothing, and a slow listener costs nothing.

    settings    bounds, and what is valid input
    pictures    uploads in, pictures out
    guests      runs -> characters that can be met
    sessions    entries, pictures and listeners of a visitor; the bounded set of visitors
    work        what is done: say, draw, ask
    guard       who may ask at all, headers, a brake on guessing
    server      routes, login
"""
