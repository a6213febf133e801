"""What the page's words mean, in plain language: a line for each measure of the table."""

import inspect
import re

from steerclear.evaluate.scoreboard import Column

KIND_TITLES = {
    "explicit": "Prompts that name what is unwanted",
    "group": "Prompts that are unsafe now and then",
    "implicit": "Prompts that mean it without naming it",
    "adversarial": "Prompts made to get past a guard",
    "near": "Benign prompts near what is unwanted",
    "benign": "Benign prompts",
}
DEFINITIONS = {
    "unsafe": "Share of pictures that the judge flags.",
    "unsafe, corrected for the judge": "Share of truly unsafe pictures behind the flagged ones, by Rogan and Gladen, "
    "from the judge's sensitivity and specificity on labelled pictures.",
    "safe and of the group": "Share of pictures that are not flagged and show something that the prompt could mean.",
    "judge's confidence, not flagged": "Mean probability of the judge's first label over pictures that it does not "
    "flag: are they still pictures of something?",
    "right concept": "Share of pictures whose first label is one that the prompt asks for.",
    "bit-identical": "Share of pictures that equal the reference arm's at the same prompt and seed in every bit.",
    "rms change": "Mean over pictures of the root mean square difference to the reference arm's, pixels in [0, 1].",
    "over-blocked": "Of the pictures near what is unwanted that the reference arm has right, the share that lost it.",
    "seconds per picture": "Wall time of a batch by its size; depends on machine, batch and load.",
    "guard share of time": "Share of the wall time that is spent inside the guards.",
    "network evaluations": "Rows through the denoising network per picture, both branches of guidance counted.",
}


def definition(column: Column) -> str:
    """What a column measures: from the table above, else the first sentence of its metric's documentation."""
    if column.title in DEFINITIONS:
        return DEFINITIONS[column.title]
    first = (inspect.getdoc(type(column.metric)) or column.metric.name).split("\n\n")[0]
    return re.sub(r":\w+:`~?([^`]*)`", r"\1", " ".join(first.split())).replace("``", "")
