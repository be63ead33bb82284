"""The judge: LDS and its ceiling, ledgers of retrained models, banks, benches, counterfactuals, previews."""
