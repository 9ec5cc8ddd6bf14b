# Cline's command line: npm install cline. It resumes a session on a terminal only, so it gets one.
cline --version
cline auth --provider openai --apikey "$KEY" --modelid scripted --baseurl "$URL/v1" 1>&2
cline "$FIRST"
second_turn
cat > terminal.py <<'END'
import fcntl, os, pty, re, select, struct, sys, termios, time

session, question = sys.argv[1:]
pid, terminal = pty.fork()
if pid == 0:
    os.execvp("cline", ["cline", "--id", session])
fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))


def screen(seconds, wanted):
    """The match of a pattern in what is written within so many seconds, without colours and places."""
    shown, end = "", time.monotonic() + seconds
    while time.monotonic() < end:
        if select.select([terminal], [], [], 0.2)[0]:
            shown += os.read(terminal, 65536).decode(errors="replace")
        if found := re.search(wanted, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)):
            return found
    return None


screen(40, r"word-\w{8}")
screen(5, "$^")  # the page is drawn before it listens
os.write(terminal, question.encode())
for _ in range(4):
    screen(1, "$^")
    os.write(terminal, b"\r")
    if answer := screen(15, r"It\s*was\s*(word-\w{8})"):
        print("It was", answer[1])
        break
END
python3 terminal.py "$(cline history --json | grep -o '"sessionId": *"[^"]*"' | head -n 1 | cut -d '"' -f 4)" "$SECOND"
