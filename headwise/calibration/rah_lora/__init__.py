"""RAH-LoRA: heads on which much depends and which look little at the image take over what heads that look do, within a trust region."""
