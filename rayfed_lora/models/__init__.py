"""Building, reading, writing and exporting models; the only importer of transformers and peft."""
