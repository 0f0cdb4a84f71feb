"""`enginesmith race`: one model through several runtimes on one card, in pairs.

command.py               what the command does, in its order
prepare.py               recipe -> weights and artifact, in a process of their own
contenders.py            who runs: the Protocol, and what a card must hold
vllm_contenders.py       ours and its peers in vLLM, with their exact arguments
transformers_*.py        Hugging Face's `generate` in a process of its own
rounds.py                two loaded models take turns, round by round
journal.py               every raw sample, on disk at once; what is still missing
ratios.py                medians, and ratios with their intervals
report.py                race.json, from the journal
page.py, chart.py, table.py
"""
