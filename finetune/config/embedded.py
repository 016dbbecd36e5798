"""What the embedded model is: facts that a record and a report state without loading it."""

NAME = "SmolLM2-135M-Instruct"
# llama.cpp's 4-bit blocks of 32 weights with a scale and an offset; the embeddings, which are the output layer too,
# are in finer steps.
QUANTISATION = "Q4_1"
