"""The web page: a classifier to use, extend and look into. gradio is imported only where the page is built."""
