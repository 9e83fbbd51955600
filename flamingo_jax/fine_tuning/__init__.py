"""Fine-tuning a Flamingo to one task: a grid of hyper-parameters, chosen on validation data
(paper 3.2, B.2.2).
"""
