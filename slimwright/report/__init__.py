def render_report(report):
    return "<html></html>"


def terminal_table(report):
    return str({k: report[k] for k in ("size", "quality", "job", "verified")})
