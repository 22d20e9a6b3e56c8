"""EleutherAI's evaluation harness (lm-eval): our model in it, our data as its tasks, its results as ours."""
