"""Stage 2, Character-GRPO: a policy draws groups of pictures, rewards compare them, the generation expert
learns.

``rollouts`` says which prompts a round draws and reads them once for the whole run; ``rewards`` turns
pictures into numbers, ``advantages`` numbers into comparisons inside a group; ``flow_grpo`` and ``nft`` are
two algorithms behind one interface (``algorithm``); ``trainer`` puts a round together for the loop that
both stages share, and ``run`` is the way in.
"""

from unichar_jax.training.grpo.run import train as train
