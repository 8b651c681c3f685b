"""What tools/pretrain_tiny.py is made of: text, rows, models, training, evaluation."""
