"""Servers of LLaMA-Factory's: where they may listen, and waiting until they answer."""

import ipaddress
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request

from stages.core.errors import UserError

HERE = "127.0.0.1"
KEY = "API_KEY"  # the variable in which LLaMA-Factory's API expects it
PAUSE = 0.5  # seconds


def is_here(host: str) -> bool:
    """Whether only this machine can reach a server on ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_any(host: str) -> bool:
    """Whether ``host`` stands for every address of this machine."""
    return host in ("0.0.0.0", "::")


def check_host(host: str) -> None:
    """Raise ``UserError`` where others could reach the server without a key."""
    if not is_here(host) and not os.environ.get(KEY):
        raise UserError(
            f"on {host} others can reach the server, and without a key anyone may use it; set "
            f"{KEY}, or leave HOST out"
        )


def check_port(host: str, port: int) -> None:
    """Raise ``UserError`` where something listens already, or nothing may."""
    try:
        with socket.create_server((host, port)):
            pass
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"port {port} of {host} can't be used ({reason}); choose another with PORT="
        ) from None


def wait(address: str, process: subprocess.Popen[bytes]) -> bool:
    """Wait until an address answers, whatever it says; False if ``process`` ends before that."""
    # A proxy in the environment is for other machines.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while process.poll() is None:
        try:
            direct.open(address, timeout=5).close()
            return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            time.sleep(PAUSE)
    return False
