"""Annotation: from pictures, a profile and a few exchanges to all that RoleScape-20 has of a character.

A model is asked, behind an endpoint or in a run, with the prompts in ``prompts/``. Every item of an answer is
judged on its own; what is refused is kept with its reason and told to the model when it is asked again. All
answers are remembered by what was asked, and everything else follows from them: an interrupted annotation is
resumed by the same command, which asks nothing twice. The user's folder is only read, its words win over the
model's, and the result is written as a whole beside it, with a page to accept or edit every item.

    kinds       what is asked for, and what is valid
    asking      prompts, answers, memory, rounds
    annotation  the order of questions; what leaks between training and tests is refused
    writing     items -> folders that `unichar data check` accepts
    review      the page, and the decisions that come back from it
"""
