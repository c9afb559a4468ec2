"""What `experiments.benchmark` measures, by subject; `measure` is how, `literal` the slow way."""
