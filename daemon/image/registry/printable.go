package registry

import (
	"regexp"
	"strings"
	"unicode"
	"unicode/utf8"
)

type printable struct {
	text string
	error
}

func (e *printable) Error() string { return e.text }
func (e *printable) Unwrap() error { return e.error }

// maxText is in bytes.
const maxText = 8 << 10

var queries = regexp.MustCompile(`(https?://[^\s"?]*)\?[^\s"]*`)

// Printable makes an error fit to be shown. Registries have a say in the text of
// many: it gets on one line, not too long and without what a terminal obeys, and
// addresses get no query, where object stores put signatures.
func Printable(err error) error {
	text := strings.Map(func(c rune) rune {
		switch {
		case c == utf8.RuneError:
			return '?'
		case unicode.IsPrint(c):
			return c
		}
		return ' '
	}, err.Error())
	text = queries.ReplaceAllString(text, "$1")
	if len(text) > maxText {
		text = strings.ToValidUTF8(text[:maxText], "") + "..."
	}
	return &printable{text, err}
}
