  // ---- the page of a study that runs: asks where it came from whether there is more, and loads itself again
  const QUIET = 3000; // milliseconds without a key or click until then
  let touched = -QUIET;
  const look = async () => {
    const answer = await fetch(location.pathname, { method: "HEAD", cache: "no-store" }).catch(() => null);
    byId("live-state").textContent = answer ? "This page follows the study." : "The study is no longer watched.";
    const news = answer?.ok && answer.headers.get("ETag");
    if (news && news !== data.live && performance.now() - touched > QUIET) location.reload();
  };
  for (const kind of ["keydown", "pointerdown", "wheel"]) {
    document.addEventListener(kind, () => { touched = performance.now(); }, { passive: true });
  }
  setInterval(look, 2000);
  look();
