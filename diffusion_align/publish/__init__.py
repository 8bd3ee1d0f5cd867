"""What leaves the house: LoRA layouts, a merged model, the model card, its check, the upload.

    layouts.py     the LoRA of diffusers in the key layout that ComfyUI reads
    merge.py       the LoRA folded into a pipeline of its own
    self_check.py  what was written, loaded again by plain diffusers, draws the same pictures
    markdown.py    texts of people inside Markdown      signature.py  whether a card was edited
    card.py        the model card (template card.md.j2)
    example.py     its example, and what a family's pipeline takes and gives
    contents.py    which files of a run are uploaded    push.py       the upload

Nothing here knows a config: `assemble.publishing` gathers the facts.
"""
