"""Baichuan2-7B in the layout of Llama, so that today's libraries load, train and serve it."""
