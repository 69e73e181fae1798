"""What to try: the search space, trials and samplers, on Optuna."""
