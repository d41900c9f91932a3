"""The parts of examples/language_model.py: a Transformer-XL language model from text file to generated text."""
