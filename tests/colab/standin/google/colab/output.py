"Outputs."


def clear(wait=False, output_tags=()):
    from IPython.display import clear_output
    clear_output(wait=wait)


def enable_custom_widget_manager():
    pass


def disable_custom_widget_manager():
    pass
