"""When, where and again: Prefect flows over the stages of dvc.yaml."""

from flows.environment import set_defaults

set_defaults()
