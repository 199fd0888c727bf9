"""A page to look inside models.

`explorer` reads images and runs models within limits, `views` draws the results as HTML, `api` returns them as data,
`page` builds the Gradio page, `uploads` keeps what people send, `server` serves it all, `command` is `t2t-vit explore`.
"""
