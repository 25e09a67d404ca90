"""The hint at what a CPU run lacks."""

import pytest

from ssl_jax import cli


@pytest.mark.parametrize(
  "pages, tunables, libc, hinted",
  [
    ("always [madvise] never", "", ("glibc", "2.36"), True),
    ("always [madvise] never", "glibc.malloc.check=1", ("glibc", "2.36"), True),
    ("always [madvise] never", "glibc.malloc.hugetlb=1", ("glibc", "2.36"), False),  # taken already
    ("[always] madvise never", "", ("glibc", "2.36"), False),  # had anyway
    ("always madvise [never]", "", ("glibc", "2.36"), False),  # not to be had
    (None, "", ("glibc", "2.36"), False),
    ("always [madvise] never", "", ("glibc", "2.31"), False),  # cannot ask
    ("always [madvise] never", "", ("", ""), False),  # another C library
  ],
)
def test_large_pages_are_hinted_at_where_they_can_be_had(monkeypatch, tmp_path, pages, tunables, libc, hinted):
  file = tmp_path / "enabled"
  if pages:
    file.write_text(pages)
  monkeypatch.setattr(cli, "_LARGE_PAGES", file)
  monkeypatch.setattr(cli.platform, "libc_ver", lambda: libc)
  monkeypatch.setenv("GLIBC_TUNABLES", tunables)
  hint = cli.large_pages_hint()
  assert bool(hint) == hinted
  if hinted:
    assert "GLIBC_TUNABLES=glibc.malloc.hugetlb=1" in hint
    monkeypatch.setattr(cli.jax, "default_backend", lambda: "gpu")
    assert not cli.large_pages_hint()  # whose steps do not use this memory
