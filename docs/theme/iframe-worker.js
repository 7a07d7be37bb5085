// Browsers refuse workers to pages that are opened as files. There the search runs in a hidden
// frame, with the functions of a worker.
if (location.protocol === "file:") {
  class FrameWorker extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      const inside = frame.contentWindow;
      this.started = new Promise((resolve) => (frame.onload = resolve));
      addEventListener("message", (event) => {
        if (event.source !== inside) return;
        this.dispatchEvent(new MessageEvent("message", { data: event.data }));
        this.onmessage?.(event);
      });
      inside.document.open();
      inside.document.write(`<body><script>
        postMessage = (data) => parent.postMessage(data, "*");
        importScripts = (...urls) => urls.reduce((earlier, url) => earlier.then(() => new Promise(
          (resolve) => {
            const script = document.createElement("script");
            Object.assign(script, { src: url, onload: resolve });
            document.body.append(script);
          })), Promise.resolve());
        <\/script><script src="${url}"><\/script></body>`);
      inside.document.close();
      this.frame = frame;
      this.inside = inside;
    }

    postMessage(data) {
      this.started.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data })));
    }

    terminate() {
      this.frame.remove();
    }
  }
  window.Worker = FrameWorker;
}
