"""One measuring engine: a question, a prompt, an unpruned pass, and every way of pruning from there.

`calibrate` and `sweep` say which ways are compared and what is concluded. `ways`, `question`, `prompts`,
`pictures` and `provenance` need no torch.
"""
