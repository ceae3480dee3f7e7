"""When, where and again: Prefect flows over the stages of dvc.yaml."""
