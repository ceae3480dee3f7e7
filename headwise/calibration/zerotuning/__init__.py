"""ZeroTuning (Han et al. 2025, arXiv 2505.11739): how much attention heads give to the first token, scaled for some of them."""
