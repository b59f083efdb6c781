"""The mini world: characters drawn by code, with all their texts, small enough for a laptop.

Two uses. *Pretraining*: `unnamed.unnamed_sample(seed)` gives endless characters that never return.
*Customisation*: `cast.CAST` are ten named characters that pretraining never sees, and
`write.write_character` writes one as a folder in the RoleScape-20 format with held-out tests.

Reading order: `world` (attributes and samplers), `draw` (pictures; `pen`, `anatomy`, `creature`,
`outfit` and `places` under it), `texts` (captions and reading them back), `voices`, `profiles`,
`dialogue`, `questions`, `cast`, `unnamed`, `write`. Everything is a pure function of its seed, and
all content was made for this package. `python -m workshop.miniworld` writes the cast as it ships.
"""
