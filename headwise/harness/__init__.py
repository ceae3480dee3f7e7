"""Tasks of lmms-eval, asked in an environment of their own: lmms-eval's libraries do not go with those of SAM 2 and DVC."""
