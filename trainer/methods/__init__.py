"""What trains: one file an option, which marks parameters and adds layers; it knows nothing of data or ranks.

`conf/method/NAME.yaml` and `NAME.py` here make the option.
"""
