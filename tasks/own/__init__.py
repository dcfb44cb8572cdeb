"""Tasks on a user's own files: labelled texts, texts to learn to write, images in a folder."""
