"""Benchmarks: one script per question, run from the project root as ``python -m benchmarks.<name>``.

Speed and memory:

- ``train_step``: how long does an optimizer step take, and how much memory does it need?
- ``step_profile``: where in a step is the time spent?
- ``step_memory``: how good is the predicted peak memory?
- ``step_scaling``: how does a step grow with tokens, rank, width and layers?
- ``decoding``: how many tokens per second are generated?
- ``epoch``: how long does an epoch of real examples take, compared with Hugging Face's Trainer and PEFT?
- ``monitoring_cost``: how much time do the callbacks add to a step?
- ``llama_estimates``: what is predicted for Llama-3 on 1, 8 and 64 GPUs?

Quality:

- ``methods_on_arc``: what do the methods reach in 80 steps on ARC and OpenBookQA?
- ``recipe``: what does a shipped recipe reach, by method and seed?
- ``reply_perplexity``: how much of a reply's perplexity is due to the token that ends it?
- ``gate_study``: do gates saturate, and do they separate prompt from response?
- ``saturated_tokens``: what does it cost to skip matmuls of tokens with saturated gates?

``training_trace`` records what short runs compute, to show that a change does not alter numbers. ``harness``
is what the scripts share.
"""
