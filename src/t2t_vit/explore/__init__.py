"""A page to look inside models: `seen` reads images and runs models within limits, `views` shows what they made of
them as HTML, `uploads` holds what people send, `page` puts it on a Gradio page, `command` is `t2t-vit explore`.
"""
