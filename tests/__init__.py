"""The checker of signatures in tests: beartype, with an int passing for a float as in PEP 484."""

from beartype import BeartypeConf, beartype

typechecked = beartype(conf=BeartypeConf(is_pep484_tower=True))
