// The stream of news. Closed while nobody sees the page; goes on from what was last told.

const KINDS = ["reading", "reset", "rows", "status", "told", "groups"];

/**
 * @param handlers by kind of news; `lost` and `back` tell of the connection.
 */
export function follow(handlers) {
  let source = null;
  let last = "";

  function open() {
    if (source !== null) return;
    source = new EventSource(`api/stream?after=${encodeURIComponent(last)}`);
    source.onopen = () => handlers.back();
    source.onerror = () => {
      handlers.lost();
      // A browser gives up for good where the answer was not a stream.
      if (source !== null && source.readyState === EventSource.CLOSED) {
        close();
        setTimeout(open, 4000);
      }
    };
    for (const kind of KINDS) {
      source.addEventListener(kind, (news) => {
        if (news.lastEventId) last = news.lastEventId;
        handlers[kind](JSON.parse(news.data));
      });
    }
  }

  function close() {
    source?.close();
    source = null;
  }

  document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
  addEventListener("pagehide", close);
  if (!document.hidden) open();
}
