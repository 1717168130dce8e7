"""What is learnt of a row, and how it is scored: one file an option, and the arithmetic that options share.

`conf/objective/NAME.yaml` and `NAME.py` here make the option. `loss.py` has the Protocol; `language_model.py` and `classes.py`
are arithmetic on what `TokenScorer` returns, which knows nothing of ranks or methods.
"""
