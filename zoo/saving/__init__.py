"""A loaded model back to files: tensors through the tables of weight names read the other way, settings, card."""
